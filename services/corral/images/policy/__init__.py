"""Whose images may be had here: which rule is for which repository, and what was proven by which key.

    rules     the settings, and which of them is for a repository
    keys      public keys, and what they verify; the only module that knows the library for it
    payload   what cosign signs
    proofs    the rows: this key has signed that this content is of this repository
    gate      the question itself: may this image have this name here, and may it be used under it?

A rule speaks of repositories, so what decides is an image's name. It is asked when a name is given (by pull, import,
load, commit, tag) and again when a container is made, since rules may have changed in between and images may have been
here before any. A proof is asked of a registry once, at a pull, and found in the rows later: using an image needs no
network. It is of a key that the rule has now: a key that is taken out of the settings takes with it what only it has
signed. Containers that exist stay as they are.

Source: containers-policy.json(5), whose words the settings use; cosign, specs/SIGNATURE_SPEC.md.
"""
