"""One file an op: public signature, host checks and the torch implementation; other backends plug in by `backend.py`."""
