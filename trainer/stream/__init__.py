"""The trainer's input: Kafka, records, positions, dead letters; and the producer and broker for it."""
