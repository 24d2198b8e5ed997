"""Training of the demo pair: corpus and tokenizer preparation, and the trainer that uses them."""
