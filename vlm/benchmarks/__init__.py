"""Benchmarks of vision-language models; one file is one benchmark."""
