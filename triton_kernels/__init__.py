"""Triton kernels, one file for each piece, installed as ``torchref.triton_kernels``.

A launcher has the name and the signature of its formula (``softmax_fwd(x, dim)``); the piece of
that name finds it by its file (``softmax.py``). Files here import torch and triton, never torchref.
"""
