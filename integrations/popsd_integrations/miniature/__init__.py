"""The method in miniature: a 162k-parameter reasoner that shows, in minutes on a CPU, what the target does to its
style.
"""
