"""How a budget of bits or of kept weights is spread over the layers: a layer on top of any method."""
