"""The table of convergence theory for black-box variational inference, measured."""
