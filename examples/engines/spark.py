"""Spark: `spark-submit examples/engines/spark.py MODEL FOLDER RESULTS`."""

import sys

import pandas as pd
from pyspark.sql import SparkSession
from pyspark.sql.functions import pandas_udf

import cropr_kernels as cropr

model, folder, out = sys.argv[1:]
predictor = cropr.Predictor(model, threads=1)
spark = SparkSession.builder.getOrCreate()


@pandas_udf("error string, classes array<int>, probabilities array<float>")
def predict(contents: pd.Series) -> pd.DataFrame:
    return pd.DataFrame({name: [*values] for name, values in predictor(contents).items()})


spark.conf.set("spark.sql.execution.arrow.maxRecordsPerBatch", 256)
photos = spark.read.format("binaryFile").option("recursiveFileLookup", True).load(folder)
results = photos.select("path", predict("content").alias("result"))
results.select("path", "result.*").write.parquet(out)
