// Scores images with a detector that `recontrast export --format onnx` wrote, and prints the decision.
//
//   dotnet run -- detector.onnx photo.ppm ...
//
// The graph holds resize, network, map and decision; its input is a batch of RGB images as bytes, of any size. Images
// are read from binary PPM files of 8 bits. Replace ReadPpm by what your camera gives.

using System.Globalization;
using Microsoft.ML.OnnxRuntime;
using Microsoft.ML.OnnxRuntime.Tensors;

if (args.Length < 2)
{
    Console.Error.WriteLine("usage: InspectImage DETECTOR.onnx IMAGE.ppm ...");
    return 2;
}
try
{
    using var detector = new InferenceSession(args[0]);
    var decides = detector.OutputMetadata.ContainsKey("defect"); // it was calibrated before its export
    foreach (var path in args.Skip(1))
    {
        var inputs = new[] { NamedOnnxValue.CreateFromTensor("image", ReadPpm(path)) };
        using var results = detector.Run(inputs);
        var outputs = results.ToDictionary(result => result.Name);
        var score = outputs["score"].AsTensor<float>()[0];
        var line = FormattableString.Invariant($"{path} {score:G9}");
        if (decides)
        {
            var defect = outputs["defect"].AsTensor<bool>()[0];
            var decision = float.IsFinite(score) ? (defect ? "defect" : "good") : "undecided";
            line += FormattableString.Invariant($" {outputs["p_value"].AsTensor<float>()[0]:G9} {decision}");
        }
        Console.WriteLine(line);
    }
    return 0;
}
catch (Exception error) when (error is IOException or InvalidDataException or OnnxRuntimeException)
{
    Console.Error.WriteLine($"InspectImage: {error.Message}");
    return 1;
}

// Returns the image as a tensor [1, height, width, 3] of bytes, RGB.
static DenseTensor<byte> ReadPpm(string path)
{
    var content = File.ReadAllBytes(path);
    var position = 2;
    if (content.Length < 2 || content[0] != 'P' || content[1] != '6')
        throw new InvalidDataException($"{path}: wanted a binary PPM file (P6)");
    int width = ReadNumber(), height = ReadNumber(), white = ReadNumber();
    position++; // the blank behind the last number
    if (white != 255 || width < 1 || height < 1)
        throw new InvalidDataException($"{path}: wanted 8 bits, and at least one pixel");
    var size = checked(3 * width * height);
    if (content.Length - position < size)
        throw new InvalidDataException($"{path}: wanted a whole file, got one that is cut off");
    return new DenseTensor<byte>(content.AsMemory(position, size), new[] { 1, height, width, 3 });

    int ReadNumber()
    {
        while (position < content.Length && (char.IsWhiteSpace((char)content[position]) || content[position] == '#'))
        {
            if (content[position] == '#')
                while (position < content.Length && content[position] != '\n') position++;
            else
                position++;
        }
        var start = position;
        while (position < content.Length && char.IsAsciiDigit((char)content[position])) position++;
        var digits = System.Text.Encoding.ASCII.GetString(content, start, position - start);
        if (!int.TryParse(digits, NumberStyles.None, CultureInfo.InvariantCulture, out var value))
            throw new InvalidDataException($"{path}: wanted a number in the header, got something else");
        return value;
    }
}
