import argparse
from pathlib import Path
def main():
    p=argparse.ArgumentParser(); p.add_argument("what"); p.add_argument("--folder",type=Path,default=Path("pocket-runs"))
    p.add_argument("--steps",type=int,default=12000); p.add_argument("--batch",type=int,default=16); p.add_argument("--count",type=int,default=60000)
    o=p.parse_args()
    if o.what=="vae":
        from .vae import train_vae; train_vae(o.folder,o.steps,o.batch,o.count)
if __name__=="__main__": main()
