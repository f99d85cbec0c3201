// Reads commands with times in milliseconds: "late T" reports a late peer at time T, "undisturbed
// D" that none was late for that long, and "lasts T" prints whether the contention lasts at time T.
#include "cpu/contention.h"

#include <iostream>
#include <string>

int main() {
  fastrnn::Contention contention;
  std::string command;
  for (int64_t time = 0; std::cin >> command >> time;) {
    const int64_t now = time * 1'000'000;
    if (command == "late")
      contention.late(now);
    else if (command == "undisturbed")
      contention.undisturbed(now);
    else
      std::cout << contention.lasts(now) << ' ';
  }
}
