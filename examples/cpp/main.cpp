// Classify an image with a package of `cropr export MODEL --format aoti`, without Python.
//
//   classify MODEL.pt2 IMAGE.f32 [HEIGHT WIDTH]
//
// IMAGE.f32 holds a batch of one, preprocessed: 3 x HEIGHT x WIDTH float32, channel by channel (default 224 x 224).
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/torch.h>

#include <chrono>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

at::Tensor read_image(const std::string& path, int64_t height, int64_t width) {
  at::Tensor image = torch::empty({1, 3, height, width});
  const auto bytes = static_cast<std::streamsize>(image.nbytes());
  std::ifstream file(path, std::ios::binary | std::ios::ate);
  if (!file) throw std::runtime_error("no image at " + path);
  if (file.tellg() != bytes)
    throw std::runtime_error(
        path + " must hold " + std::to_string(bytes) + " bytes, holds " + std::to_string(file.tellg()));
  file.seekg(0);
  file.read(static_cast<char*>(image.data_ptr()), bytes);
  return image;
}

void classify(const std::string& package, const at::Tensor& image) {
  torch::inductor::AOTIModelPackageLoader model(package);
  at::Tensor logits = model.run({image}).at(0);
  const auto start = std::chrono::steady_clock::now();
  logits = model.run({image}).at(0);
  const std::chrono::duration<double, std::milli> spent = std::chrono::steady_clock::now() - start;
  const auto [values, classes] = logits[0].topk(std::min<int64_t>(5, logits.size(1)));
  for (int64_t i = 0; i < classes.size(0); ++i)
    std::cout << "class " << classes[i].item<int64_t>() << "  " << values[i].item<float>() << "\n";
  std::cerr << spent.count() << " ms\n";
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3 && argc != 5) {
    std::cerr << "usage: classify MODEL.pt2 IMAGE.f32 [HEIGHT WIDTH]\n";
    return 2;
  }
  const int64_t height = argc == 5 ? std::atoll(argv[3]) : 224, width = argc == 5 ? std::atoll(argv[4]) : 224;
  try {
    const c10::InferenceMode guard;
    classify(argv[1], read_image(argv[2], height, width));
  } catch (const std::exception& error) {
    std::cerr << "classify: " << error.what() << "\n";
    return 1;
  }
}
