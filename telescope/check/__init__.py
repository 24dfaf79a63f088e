"""The coordinate check: does a model and its optimizer follow a width rule?"""
