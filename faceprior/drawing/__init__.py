"""How `faceprior.procedural` draws: a person is sampled (`people`), built as a solid (`anatomy`, `hair`, `wardrobe`),
traced (`tracing`), coloured (`complexion`, `pigments`) and lit before a background (`rendering`, `backdrop`)."""
