"""Severities of the scanner and the model, evidence, signs of an intrusion, and known limits of the model."""
