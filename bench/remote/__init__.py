"""Measuring on a board: the bench sends itself there, runs detached, and brings the result back.

``bench.remote.target.Target`` is this host or a board behind one interface.
"""
