// Classify a photo with a package of `cropr export MODEL --format aoti`, without Python.
//
//   classify MODEL.pt2 PHOTO.ppm [SIDE]
//
// PHOTO.ppm is a binary PPM (P6), which Pillow, ImageMagick, ffmpeg and GIMP write; SIDE is that of the model's images,
// in pixels (default 224). Preprocessing is that of cropr and timm, up to a level or two of a pixel; its constants are
// in `photos: ...`, the first line of `cropr calibrate MODEL PHOTOS`.
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/torch.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <limits>
#include <stdexcept>
#include <string>

namespace {

constexpr double kCropPct = 0.875;          // share of the resized photo's side that is kept
const float kMean[3] = {0.5F, 0.5F, 0.5F};  // of red, green and blue in [0, 1]
const float kDeviation[3] = {0.5F, 0.5F, 0.5F};

int64_t read_number(std::istream& file) {
  while (file >> std::ws && file.peek() == '#') file.ignore(std::numeric_limits<std::streamsize>::max(), '\n');
  int64_t number = 0;
  file >> number;
  return number;
}

// Read a photo: (1, 3, height, width) uint8.
at::Tensor read_photo(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error("no photo at " + path);
  std::string magic(2, ' ');
  file.read(magic.data(), 2);
  const int64_t width = read_number(file), height = read_number(file), highest = read_number(file);
  constexpr int64_t max_side = 1 << 15;
  if (!file || magic != "P6" || highest != 255 || std::min(width, height) < 1 || std::max(width, height) > max_side)
    throw std::runtime_error(path + " must be a binary PPM (P6) of 8 bits and at most 32768 pixels a side");
  file.get();
  const at::Tensor pixels = torch::empty({1, height, width, 3}, torch::kUInt8);
  file.read(static_cast<char*>(pixels.data_ptr()), pixels.numel());
  if (file.gcount() != pixels.numel())
    throw std::runtime_error(
        path + " must hold " + std::to_string(pixels.numel()) + " bytes of pixels, holds " +
        std::to_string(file.gcount()));
  return pixels.permute({0, 3, 1, 2});
}

// Resize, crop and normalize a photo: (1, 3, side, side).
at::Tensor prepare(const at::Tensor& photo, int64_t side) {
  const double shorter = static_cast<double>(std::min(photo.size(2), photo.size(3)));
  const double scale = std::floor(static_cast<double>(side) / kCropPct) / shorter;
  const auto scaled = [&](int64_t size) { return static_cast<int64_t>(static_cast<double>(size) * scale + 1e-6); };
  const int64_t height = scaled(photo.size(2)), width = scaled(photo.size(3));
  const auto start = [&](int64_t size) { return static_cast<int64_t>(std::nearbyint(0.5 * double(size - side))); };
  at::Tensor image = at::_upsample_bicubic2d_aa(photo, {height, width}, false);
  image = image.slice(2, start(height), start(height) + side).slice(3, start(width), start(width) + side);
  const at::Tensor mean = torch::tensor(at::ArrayRef<float>(kMean)).view({3, 1, 1});
  const at::Tensor deviation = torch::tensor(at::ArrayRef<float>(kDeviation)).view({3, 1, 1});
  return ((image / 255 - mean) / deviation).contiguous();
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
  if (argc != 3 && argc != 4) {
    std::cerr << "usage: classify MODEL.pt2 PHOTO.ppm [SIDE]\n";
    return 2;
  }
  try {
    const int64_t side = argc == 4 ? std::atoll(argv[3]) : 224;
    if (side < 1) throw std::runtime_error(std::string("SIDE must be a number of pixels, got ") + argv[3]);
    const c10::InferenceMode guard;
    classify(argv[1], prepare(read_photo(argv[2]), side));
  } catch (const std::exception& error) {
    std::cerr << "classify: " << error.what() << "\n";
    return 1;
  }
}
