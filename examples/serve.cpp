// Run a package of examples/serve.py without Python: serve LIBRARY PACKAGE INPUTS OUTPUTS

#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/torch.h>

#include <fstream>
#include <iostream>
#include <iterator>
#include <vector>

int main(int count, char** words) {
  if (count != 5) {
    std::cerr << "serve LIBRARY PACKAGE INPUTS OUTPUTS\n";
    return 2;
  }
  // What Python does on `import capsroute`: the library registers the operators that the package calls.
  if (!dlopen(words[1], RTLD_NOW)) {
    std::cerr << dlerror() << "\n";
    return 1;
  }
  torch::inductor::AOTIModelPackageLoader model(words[2]);  // load once, run as often as you like

  std::ifstream inputs(words[3], std::ios::binary);
  const std::vector<char> bytes{std::istreambuf_iterator<char>(inputs), {}};
  const c10::IValue list = torch::pickle_load(bytes);  // of torch.save
  std::vector<at::Tensor> tensors;
  for (const c10::IValue& tensor : list.toListRef()) tensors.push_back(tensor.toTensor());
  const at::Tensor interests = model.run(tensors).at(0);

  const std::vector<char> saved = torch::pickle_save(interests);
  std::ofstream(words[4], std::ios::binary).write(saved.data(), std::streamsize(saved.size()));
  std::cout << "interests of " << interests.size(0) << " users, without Python\n";
}
