from faceprior.procedural import main

if __name__ == "__main__":
    main()
