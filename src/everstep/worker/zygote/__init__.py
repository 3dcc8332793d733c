"""Zygote: a process with all of a worker's imports, from which workers are forked.

It has one thread, no CUDA context and no model, so a fork of it is as good as a new process and
takes milliseconds instead of the seconds of the imports. Linux only.

The process that starts a zygote owns it: the zygote ends when its owner does. Its workers outlive
it, as each belongs to the service at the other end of its socket.
"""
