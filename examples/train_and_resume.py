"""Train, save, and resume on a new client: the losses are the same."""

import everstep


def main() -> None:
    """Run the example."""
    with everstep.ServiceClient() as service:
        client = service.create_lora_training_client("everstep/pico", rank=16, seed=1).result()
        tokens = client.get_tokenizer()("Every step is kept, and every step comes back.")[
            "input_ids"
        ]
        datum = everstep.Datum(
            model_input=everstep.ModelInput.from_ints(tokens[:-1]),
            loss_fn_inputs={"target_tokens": tokens[1:], "weights": [1.0] * (len(tokens) - 1)},
        )

        def step(run: everstep.TrainingClient) -> float:
            future = run.forward_backward([datum], "cross_entropy")
            run.optim_step(everstep.AdamParams(learning_rate=5e-3)).result()
            return future.result().metrics["loss:sum"]

        for _ in range(5):
            step(client)
        path = client.save_state("five", overwrite=True).result().path
        resumed = service.create_training_client_from_state_with_optimizer(path).result()
        print([step(client) for _ in range(3)])
        print([step(resumed) for _ in range(3)])


if __name__ == "__main__":
    main()
