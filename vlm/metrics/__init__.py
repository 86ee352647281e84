"""Metrics of vision-language models; one file is one metric."""
