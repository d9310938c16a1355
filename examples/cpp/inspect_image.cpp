// Scores images with a detector that `recontrast export --format openvino` wrote, and prints the decision.
//
//   inspect_image detector.xml photo.ppm ...
//
// The graph holds resize, network, map and decision; its input is a batch of RGB images as bytes, of any size. Images
// are read from binary PPM files of 8 bits, to which any program converts (`magick photo.png -depth 8 photo.ppm`).
// Replace `ReadPpm` by what your camera gives.

#include <cctype>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <fstream>
#include <openvino/openvino.hpp>
#include <stdexcept>
#include <string>

namespace {

// Reads the next number of a PPM header, past blanks and comments.
size_t ReadNumber(std::istream& file, const std::string& path) {
  int next = file.get();
  while (std::isspace(next) || next == '#') {
    if (next == '#') {
      while (next != '\n' && next != EOF) next = file.get();
    } else {
      next = file.get();
    }
  }
  size_t value = 0;
  if (!std::isdigit(next)) throw std::runtime_error(path + ": wanted a number in the header, got something else");
  for (; std::isdigit(next); next = file.get()) {
    value = 10 * value + static_cast<size_t>(next - '0');
    if (value > 1000000) throw std::runtime_error(path + ": wanted at most 1000000 pixels a side, got more");
  }
  return value;  // the blank behind it has been read
}

// Returns the image as a tensor [1, height, width, 3] of bytes, RGB.
ov::Tensor ReadPpm(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error(path + ": wanted a PPM file, got no file that can be read");
  if (file.get() != 'P' || file.get() != '6') throw std::runtime_error(path + ": wanted a binary PPM file (P6)");
  const size_t width = ReadNumber(file, path), height = ReadNumber(file, path), white = ReadNumber(file, path);
  if (white != 255 || !width || !height) throw std::runtime_error(path + ": wanted 8 bits, and at least one pixel");
  ov::Tensor image(ov::element::u8, {1, height, width, 3});
  const auto size = static_cast<std::streamsize>(image.get_byte_size());
  if (!file.read(reinterpret_cast<char*>(image.data<uint8_t>()), size)) {
    throw std::runtime_error(path + ": wanted a whole file, got one that is cut off");
  }
  return image;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 3) {
    std::fprintf(stderr, "usage: inspect_image DETECTOR.xml IMAGE.ppm ...\n");
    return 2;
  }
  try {
    ov::Core core;
    // Without the hint, processors with bfloat16 would compute other scores than those that were calibrated.
    ov::CompiledModel detector = core.compile_model(argv[1], "CPU", ov::hint::inference_precision(ov::element::f32),
                                                    ov::hint::performance_mode(ov::hint::PerformanceMode::LATENCY));
    bool decides = false;  // a detector that was calibrated before its export has more outputs
    for (const auto& output : detector.outputs()) decides |= output.get_names().count("defect") > 0;
    ov::InferRequest request = detector.create_infer_request();
    for (int i = 2; i < argc; ++i) {
      request.set_input_tensor(ReadPpm(argv[i]));
      request.infer();
      const float score = request.get_tensor("score").data<float>()[0];
      std::printf("%s %.9g", argv[i], score);
      if (decides) {
        // A score that is not a number belongs to an image that nobody has decided on.
        const bool defect = request.get_tensor("defect").data<bool>()[0];
        const char* decision = std::isfinite(score) ? (defect ? "defect" : "good") : "undecided";
        std::printf(" %.9g %s", request.get_tensor("p_value").data<float>()[0], decision);
      }
      std::printf("\n");
    }
  } catch (const std::exception& error) {
    std::fprintf(stderr, "inspect_image: %s\n", error.what());
    return 1;
  }
}
