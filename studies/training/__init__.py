"""How the models in the zoo were made: `data`, `features`, `emoji`, each a command of its own."""
