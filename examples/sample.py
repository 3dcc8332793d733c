"""Teach an adapter one sentence, then sample from it and print the logprobs."""

import everstep

SENTENCE = "Every step is kept, and every step comes back."


def main() -> None:
    """Run the example."""
    with everstep.ServiceClient() as service:
        client = service.create_lora_training_client("everstep/pico", rank=16, seed=1).result()
        tokenizer = client.get_tokenizer()
        tokens = [*tokenizer.encode(SENTENCE), tokenizer.eos_token_id]
        datum = everstep.Datum(
            model_input=everstep.ModelInput.from_ints(tokens[:-1]),
            loss_fn_inputs={"target_tokens": tokens[1:], "weights": [1.0] * (len(tokens) - 1)},
        )
        for _ in range(40):
            client.forward_backward([datum], "cross_entropy")
            client.optim_step(everstep.AdamParams(learning_rate=5e-3))

        path = client.save_weights_for_sampler("sentence").result().path
        sampler = service.create_sampling_client(model_path=path).result()
        prompt = everstep.ModelInput.from_ints(tokenizer.encode("Every"))
        params = everstep.SamplingParams(max_tokens=60, temperature=0.8, seed=7)
        for sequence in sampler.sample(prompt, 3, params).result().sequences:
            text = tokenizer.decode(sequence.tokens, skip_special_tokens=True)
            print(f"{sequence.stop_reason:>6}  {sum(sequence.logprobs):8.3f}  Every{text}")


if __name__ == "__main__":
    main()
