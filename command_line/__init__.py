"""What a user may type. What is wrong with it is an InputError, in all of command_line.

groups.py and trainer_arguments.py declare the arguments (declarations.py: how; effects.py: where
they have an effect; published.py: what others call them); reading.py turns words into values;
scripts.py adds a script's defaults, contradictions.py refuses and warns; starting.py calls them
first, as these need neither torch nor transformers. arguments.py makes ``Arguments`` of the values
and refuses what only the libraries know, and settings.py names a run.
"""
