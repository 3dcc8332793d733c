"""Save and restore two agents that learn together as one."""

import everstep


def main() -> None:
    """Run the example."""
    with everstep.ServiceClient() as service:
        group = everstep.CheckpointGroup(service, "duo", size=2, keep_last=1)
        restored = group.restore().result()
        if restored is None:
            futures = [
                service.create_lora_training_client("everstep/pico", rank=8, seed=seed)
                for seed in range(2)
            ]
            clients, step = [future.result() for future in futures], 0
        else:
            clients, step = list(restored.clients), restored.states[0].step
        print("from step", step)
        datum = everstep.Datum(
            model_input=everstep.ModelInput.from_ints([1, 2, 3]),
            loss_fn_inputs={"target_tokens": [2, 3, 4], "weights": [1.0] * 3},
        )
        for _ in range(3):
            for client in clients:
                client.forward_backward([datum], "cross_entropy")
                client.optim_step(everstep.AdamParams(learning_rate=5e-3))
            step += 1
        saved = group.save_all(clients, everstep.LoopState(step)).result()
        print(f"complete at step {saved.step}", *(m.path for m in saved.members), sep="\n  ")


if __name__ == "__main__":
    main()
