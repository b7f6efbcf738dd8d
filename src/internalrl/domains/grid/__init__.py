"""The grid world of arXiv 2512.20605, appendix A."""
