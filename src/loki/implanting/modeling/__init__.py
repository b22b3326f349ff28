"""The modelling file that lies in converted model folders, so that they load without this package."""
