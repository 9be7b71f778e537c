"""What slimtune shows: the boundary that text of files and models passes, sentences of failures, progress, figures."""
