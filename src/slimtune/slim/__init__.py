"""A model made smaller and faster: quantized after training, and written in formats that engines read.

Each step says what it lost.
"""
