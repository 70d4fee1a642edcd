#include "comm/call.h"

#include <algorithm>

namespace ringreduce {
namespace {

size_t product(const std::vector<int64_t>& shape, size_t from) {
  size_t count = 1;
  for (size_t dimension = from; dimension < shape.size(); ++dimension) {
    count *= static_cast<size_t>(shape[dimension]);
  }
  return count;
}

/// FNV-1a over 64-bit words.
uint64_t mix(uint64_t hash, uint64_t word) { return (hash ^ word) * 0x100000001b3ull; }

}  // namespace

size_t Tensor::count() const { return product(input_layout.shape, 0); }

Header Call::header(uint64_t sequence) const {
  Header header;
  header.sequence = sequence;
  header.kind = static_cast<uint8_t>(kind);
  header.op = static_cast<uint8_t>(op);
  header.dtype = static_cast<uint8_t>(dtype);
  header.root = root;
  header.num_tensors = static_cast<uint32_t>(tensors.size());
  header.count = kind == Kind::allocate ? bytes : 0;
  header.on_gpu = device >= 0;
  header.segment = segment;
  header.input_offset = input_offset;
  header.output_offset = output_offset;
  uint64_t hash = 0xcbf29ce484222325ull;
  // An allgather's first dimensions may differ: its header shows a row, and the number of rows
  // apart from it.
  const size_t first = kind == Kind::allgather ? 1 : 0;
  for (const Tensor& tensor : tensors) {
    const std::vector<int64_t>& shape = tensor.input_layout.shape;
    hash = mix(hash, shape.size());
    for (size_t dimension = first; dimension < shape.size(); ++dimension) {
      hash = mix(hash, static_cast<uint64_t>(shape[dimension]));
    }
    header.count += product(shape, first);
  }
  header.shapes_hash = hash;
  if (tensors.empty()) return header;
  const std::vector<int64_t>& shape = tensors.front().input_layout.shape;
  const size_t shown = shape.size() - std::min(first, shape.size());
  header.dimensions = static_cast<uint8_t>(std::min<size_t>(shown, 255));
  for (size_t i = 0; i < std::min<size_t>(shown, Header::max_dimensions); ++i) {
    header.shape[i] = static_cast<uint64_t>(shape[first + i]);
  }
  if (kind == Kind::allgather)
    header.rows = shape.empty() ? 1 : static_cast<uint64_t>(shape.front());
  return header;
}

std::vector<size_t> split_rows(size_t rows, size_t row_elements, int size) {
  const auto parts = static_cast<size_t>(size);
  std::vector<size_t> offsets{0};
  for (size_t part = 0; part < parts; ++part) {
    offsets.push_back(offsets.back() +
                      (rows / parts + (part < rows % parts ? 1 : 0)) * row_elements);
  }
  return offsets;
}

Operands::Operands(const Call& call) : call_(call) {
  message_.reduction.dtype = call.dtype;
  message_.reduction.op = call.op;
  message_.item_bytes = size_of(call.dtype);
  for (size_t index = 0; index < call.tensors.size(); ++index) {
    const Tensor& tensor = call.tensors[index];
    const size_t count = tensor.count();
    const size_t output_count = product(tensor.output_layout.shape, 0);
    const char* input = tensor.input;
    char* output = tensor.output;
    if (input && !tensor.input_layout.contiguous()) {
      packed_.push_back(std::make_unique_for_overwrite<char[]>(count * message_.item_bytes));
      pack(tensor.input_layout, input, packed_.back().get());
      input = packed_.back().get();
    }
    if (output && !tensor.output_layout.contiguous()) {
      // In place, the packed input serves as the packed output: as elsewhere, a rank then has one
      // buffer.
      if (tensor.input != tensor.output) {
        packed_.push_back(
            std::make_unique_for_overwrite<char[]>(output_count * message_.item_bytes));
      }
      output = packed_.back().get();
      unpacking_.push_back({index, output});
    }
    if (input) message_.inputs.push_back({count_, count, const_cast<char*>(input)});
    if (output) message_.outputs.push_back({count_, output_count, output});
    count_ += count;
  }
}

void Operands::place_outputs_at(size_t offset) {
  for (Run& run : message_.outputs) run.offset = offset;
}

void Operands::place_inputs_at(size_t offset) {
  for (Run& run : message_.inputs) run.offset = offset;
}

std::vector<size_t> Operands::scatter_rows(int rank, int size) {
  const auto rows = static_cast<size_t>(call_.tensors.front().input_layout.shape.front());
  const std::vector<size_t> offsets = split_rows(rows, rows == 0 ? 0 : count_ / rows, size);
  place_outputs_at(offsets[static_cast<size_t>(rank)]);
  return offsets;
}

void Operands::set_output(char* data, size_t count) { message_.outputs = {{0, count, data}}; }

void Operands::finish() {
  for (const auto& [index, packed] : unpacking_) {
    const Tensor& tensor = call_.tensors[index];
    unpack(tensor.output_layout, packed, tensor.output);
  }
}

}  // namespace ringreduce
