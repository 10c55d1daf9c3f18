"""Trainers and engines that models are trained with. Each module imports its library, so import it where it is used."""
