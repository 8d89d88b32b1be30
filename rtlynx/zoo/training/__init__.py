"""How the models in the zoo were made: `data`, `features`, `flux_emoji`, each a command of its own."""
