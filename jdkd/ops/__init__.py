"""The operators: schema, fake, autograd rule and backend table, one file per operator."""
