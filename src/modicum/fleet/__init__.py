"""Many users' adapters trained together: cohorts on one base model, streamed into the store."""
