"""KPSVD: a sum of Kronecker products that starts as the leading ones of the weight itself."""
