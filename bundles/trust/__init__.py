"""Whose signature counts: keys, DSSE and OMS signatures, the trust root, and the policy over them."""
