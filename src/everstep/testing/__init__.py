"""Testing of durability: shows that acknowledged work survives, in Everstep's storage or yours.

crashfs      a real file system on an image, whose power can be cut
blocktrace   every block that a real file system wrote, replayed up to any moment and in any
             order that its flushes allow
memoryfs     a model of a file system: the possible states after a crash of a program. Needs no root
modelstore   a store of checkpoints in a dictionary, the model for a real one
strategies   Hypothesis strategies: programs for a store, crashes of a recording
history      the acknowledgements of a program, and the states that they allow
invariants   the invariants of an Everstep home: its vault and its ledger
workload     a program that uses both and reports its acknowledgements
nursery      processes that start in milliseconds
faulty       system calls that fail, hang or do nothing
devices      loop devices and mounts

Failpoints are in `everstep.failpoints`, a service for tests is a fixture of the pytest plugin. The
guide is ``docs/guides/testing.md``.
"""
