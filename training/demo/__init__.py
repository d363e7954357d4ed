"""python -m training.demo: the pack's main job on a folder of photographs, ending in one contact sheet."""
