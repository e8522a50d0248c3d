"""The networks under study, in plain torch."""
