#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <map>
#include <string>
#include <vector>

namespace shapes {

template <typename T> struct Square {
    T side;
    explicit Square(T side) : side(side) {}
    __attribute__((noinline)) T area() const { return side * side; }
    inline T perimeter() const { return side * 4; }
};

template <typename T, typename F> __attribute__((noinline)) T fold(const std::vector<T> &values, F combine)
{
    T result{};
    for (const T &value : values)
        result = combine(result, value);
    return result;
}

namespace {
__attribute__((noinline)) int hidden(int value, const char *text)
{
    return std::snprintf(nullptr, 0, "%d %s", value, text);
}
} // namespace

class Index {
  public:
    virtual ~Index() = default;
    __attribute__((noinline)) virtual void add(const std::string &name, int value) { entries[name] += value; }
    bool operator<(const Index &other) const { return entries.size() < other.entries.size(); }

  private:
    std::map<std::string, int> entries;
};

} // namespace shapes

int main(int argc, char **argv)
{
    shapes::Index index;
    std::vector<int> values;
    for (int i = 0; i < 32 * argc; i++) {
        values.push_back((i * 37) % 101);
        index.add(argv[0] + std::to_string(i % 5), i);
    }
    std::sort(values.begin(), values.end(), [](int a, int b) { return a > b; });
    int sum = shapes::fold(values, [&](int a, int b) { return a + b * argc; });
    shapes::Square<double> square(sum);
    std::printf("%f %f %d\n", square.area(), square.perimeter(), shapes::hidden(sum, argv[0]));
    return 0;
}
