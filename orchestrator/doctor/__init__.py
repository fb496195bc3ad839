"""Is this server fit for NoHype? Checks that only read, and need neither an installation nor a manager.

Uses the standard library only, so that it runs from one file (`make doctor`).
"""
