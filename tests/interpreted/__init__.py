"""The Triton kernels in Triton's interpreter, in a process of their own that ``tests/test_triton.py`` starts."""
