"""Adapter methods: one folder each, with what a recipe may say (`settings`) and what it does (`tuner`)."""
