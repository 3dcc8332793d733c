"""A training loop that can be stopped anywhere, and resumes exactly where it stopped.

Run it twice: the second run resumes. Or stop it in the middle, with Ctrl-C or SIGKILL.
"""

import random
import sys

import everstep

SENTENCES = [
    b"Every step is kept.",
    b"Every step comes back.",
    b"No step is lost.",
    b"Step by step.",
]
POLICY = everstep.CheckpointPolicy(every_steps=5, keep_last=2, keep_best=1, metric="loss")


def main(steps: int, run_name: str) -> None:
    """Train up to a number of steps."""
    with everstep.ServiceClient() as service:
        resumed = everstep.resume_or_create(
            service, run_name, "everstep/pico", rank=16, seed=1
        ).result()
        client, state, report = resumed
        print(f"from step {state.step}:", report.path or "a new run")
        data = [datum(list(sentence)) for sentence in SENTENCES]  # pico's tokens are bytes

        def train(state: everstep.LoopState) -> None:
            step, epoch, position = state.step, state.epoch, state.position
            while step < steps:
                order = random.Random(epoch).sample(range(len(data)), len(data))
                passed = client.forward_backward([data[order[position]]], "cross_entropy")
                client.optim_step(everstep.AdamParams(learning_rate=5e-3)).result()
                loss = passed.result().metrics["loss:sum"]
                step, position = step + 1, position + 1
                if position == len(data):
                    epoch, position = epoch + 1, 0
                print(f"step {step:3}  loss {loss!r}", flush=True)
                state = everstep.LoopState(step, epoch, position)
                saves.step(state, {"loss": loss})
            print("kept", saves.finish(state).result().path)

        with (
            everstep.Checkpointer(resumed, POLICY) as saves,
            everstep.Recovery(service, resumed, saves) as recovery,
        ):
            recovery.run(train)


def datum(tokens: list[int]) -> everstep.Datum:
    """Build a datum whose loss covers all tokens of a sentence."""
    return everstep.Datum(
        model_input=everstep.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={"target_tokens": tokens[1:], "weights": [1.0] * (len(tokens) - 1)},
    )


if __name__ == "__main__":
    main(
        int(sys.argv[1]) if len(sys.argv) > 1 else 12,
        sys.argv[2] if len(sys.argv) > 2 else "example",
    )
