"""One file an op: public signature, host checks and the torch implementation; `backend.py` picks other kernels."""
