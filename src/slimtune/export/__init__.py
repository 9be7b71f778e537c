"""A tuned model in the form that another program reads, each written whole and compared with what it came from.

`formats.py` says which forms there are; a form is a file here, or a folder where it needs several.
"""
