"""Proofs that what was acknowledged survives: for Everstep's storage, and for yours.

crashfs      a real file system on an image, whose power can be cut
blocktrace   every block that a real file system wrote, replayed up to any moment and in any
             order that its flushes allow
memoryfs     a model of a file system: what a crash may leave of what a program did; needs no root
modelstore   a store of checkpoints in a dictionary: what a real one must agree with
strategies   Hypothesis strategies: programs of a store, crashes of what was recorded
history      what a program was told, and so what must be found
invariants   the same for a home of Everstep: its vault and its ledger
workload     a program that uses both and says what it was told
nursery      processes that begin in milliseconds
faulty       calls of the operating system that fail, hang or do nothing
devices      loop devices and mounts

Failpoints are in `everstep.failpoints`, a service for tests is a fixture of the pytest plugin. The
guide is ``docs/guides/testing.md``.
"""
