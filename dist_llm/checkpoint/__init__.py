"""Checkpoints that are either sound and whole or refused: safetensors files, a JSON manifest, one atomic rename.

    step-00000100.tmp-<id>/  --fsync, rename-->  step-00000100/
                                                 rank-00000.safetensors ...  rectangles of logical tensors
                                                 manifest.json               what is where, a sha256 of each rectangle
                                                 manifest.sha256             the manifest's digest, for `sha256sum -c`

Invariants: nothing is written into a committed directory; no byte reaches a tensor before its digest was checked;
nothing read from disk is executed.
"""
