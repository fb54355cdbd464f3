"""Grammars that answers must follow: how they are written, what they become, and the guard that tries them first.

Here because gateway and replicas need the same: a client hears of a grammar that cannot be compiled before a replica
does, and a replica trusts nobody.
"""
