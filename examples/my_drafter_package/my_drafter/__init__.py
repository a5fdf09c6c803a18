"""A drafter and a verifier around transformers: an example of a package that extends Quasar from outside."""
