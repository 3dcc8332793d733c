"""The worker: the process that holds models and runs and does the arithmetic.

It knows engine, vault and interchange, but no ledger, no runtime and no HTTP. The runtime
speaks to it through the messages of `everstep.worker.protocol`.
"""
