"""The ground floor: argument checks, layouts, the logit transform, exact rounding and tiles. It knows no kernel."""
